"""The recipes of docs/modules.md do what they say: before and after are run, and give the same results and
gradients."""

import re
from pathlib import Path

import pytest
import torch

from flash_attn.nn import MultiheadAttention

PAGE = Path(__file__).parent.parent / "docs" / "modules.md"
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def recipes():
    """[(title, before, after)], and the code that they share."""
    shared, *sections = re.split(r"^## (?=\d)", PAGE.read_text(), flags=re.MULTILINE)
    found = []
    for section in sections:
        title, blocks = section.splitlines()[0], BLOCK.findall(section)
        assert len(blocks) == 2, f"{title}: {len(blocks)} blocks"
        found.append((title, *blocks))
    return found, *BLOCK.findall(shared)


def test_there_are_five_recipes():
    found, _ = recipes()
    assert [title.split(".")[0] for title, *_ in found] == list("12345")


@pytest.mark.parametrize("number", range(5))
def test_recipe(number):
    found, shared = recipes()
    title, *blocks = found[number]
    results = []
    for block in blocks:
        names = {}
        torch.manual_seed(0)
        exec(compile(shared, "shared", "exec"), names)
        exec(compile(block, title, "exec"), names)
        out, x = names["out"], names["x"]
        (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
        results.append((out.detach(), x.grad))
    for before, after in zip(*results):
        assert before.abs().max() > 0.1
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    assert "flash_attn" in blocks[1] and "flash_attn" not in blocks[0]


def test_the_page_names_every_difference():
    """What the docstring lists stands on the page too."""
    page = PAGE.read_text()
    for word in re.findall(r"\w+=True|is_causal|[Nn]ested tensors|1/256", MultiheadAttention.__doc__):
        assert word.lower() in page.lower(), word
