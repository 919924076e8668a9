"""flash_attn.replace: torch's encoders and decoders keep their results, optimizers and names; what cannot be
swapped is left, with the reason; and all of it can be undone."""

import copy

import pytest
import torch
from torch import nn

import flash_attn
from flash_attn import ArgumentTypeError, ArgumentValueError
from flash_attn.nn import MultiheadAttention

# A bool mask beside a float one: torch warns, and takes it.
pytestmark = pytest.mark.filterwarnings("ignore:Support for mismatched")


def encoder(device="cpu", dropout=0.0, **options):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=options.get("norm_first") is None).to(device)


def decoder(device="cpu"):
    torch.manual_seed(0)
    return nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 2, 32, 0.0, batch_first=True), 2).to(device)


def assert_trains_as(theirs, ours, *args, **kwargs):
    """The loss is a random sum: that of squares hardly depends on what a layer norm is given."""
    results = []
    for model in theirs, ours:
        model.zero_grad()
        out = model(*args, **kwargs)
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
        (out * weights).sum().backward()
        results.append(out)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters()):
        size = b.grad.abs().max().item()
        assert size > 1e-2, name
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4 * size, msg=lambda text: f"{name}: {text}")


def test_replace_in_an_encoder(device):
    """Values and gradients stay, and undo() brings torch's modules back."""
    theirs = encoder(device)
    ours = copy.deepcopy(theirs)
    modules, parameters = list(ours.modules()), list(ours.parameters())
    report = flash_attn.replace(ours)
    assert report.swapped == ["layers.0.self_attn", "layers.1.self_attn"] and report.left == {}
    assert all(a is b for a, b in zip(ours.modules(), modules))
    assert all(a is b for a, b in zip(ours.parameters(), parameters))
    assert type(ours.layers[1].self_attn) is MultiheadAttention
    assert ours.state_dict().keys() == theirs.state_dict().keys()

    x = torch.randn(3, 9, 16, device=device)
    padding = torch.arange(9, device=device) >= torch.tensor([[9], [4], [1]], device=device)
    causal = nn.Transformer.generate_square_subsequent_mask(9, device=device)
    for masks in ({}, dict(src_key_padding_mask=padding), dict(mask=causal),
                  dict(mask=causal, is_causal=True),
                  dict(mask=causal.isneginf(), src_key_padding_mask=padding)):
        assert_trains_as(theirs, ours, x, **masks)
    report.undo()
    assert type(ours.layers[1].self_attn) is nn.MultiheadAttention
    report.undo()
    assert torch.equal(ours(x), theirs(x))


@pytest.mark.parametrize("length", [9, 1030])               # from 1024 keys on, GPUs get float padding with its bool twin
@pytest.mark.parametrize("mask", [None, "bool", "float", "per head"])
@pytest.mark.parametrize("padding", ["bool", "float", "finite"])
def test_an_encoder_trains_with_masks(device, padding, mask, length):
    theirs = encoder(device)
    ours = copy.deepcopy(theirs)
    flash_attn.replace(ours)
    x = torch.randn(3, length, 16, device=device)
    hidden = torch.arange(length, device=device) >= torch.tensor([[length], [length // 2], [1]], device=device)
    keys = {"bool": hidden, "float": torch.zeros_like(x[..., 0]).masked_fill(hidden, -torch.inf),
            "finite": torch.randn_like(x[..., 0]).masked_fill(hidden, -torch.inf)}[padding]
    causal = nn.Transformer.generate_square_subsequent_mask(length, device=device)
    attention = {None: None, "bool": causal.isneginf(), "float": causal,
                 "per head": torch.randn(6, length, length, device=device)}[mask]
    assert_trains_as(theirs, ours, x, mask=attention, src_key_padding_mask=keys)


@pytest.mark.parametrize("fast_path", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_encoder_in_eval(device, padded, fast_path, monkeypatch):
    """Torch's fused inference path reads the parameters and never calls us; without it we are called. Both
    give torch's values."""
    theirs = encoder(device).eval()
    ours = copy.deepcopy(theirs)
    flash_attn.replace(ours)
    calls, forward = [], MultiheadAttention.forward
    monkeypatch.setattr(MultiheadAttention, "forward", lambda *args, **kwargs: (
        calls.append(1), forward(*args, **kwargs))[1])
    x = torch.randn(3, 9, 16, device=device)
    padding = (torch.arange(9, device=device) >= torch.tensor([[9], [4], [1]], device=device))
    masks = dict(src_key_padding_mask=padding) if padded else {}
    torch.backends.mha.set_fastpath_enabled(fast_path)
    try:
        with torch.no_grad():
            torch.testing.assert_close(ours(x, **masks), theirs(x, **masks), rtol=1e-4, atol=1e-4)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    assert len(calls) == (0 if fast_path else 2)


def test_replace_in_a_decoder(device):
    theirs = decoder(device)
    ours = copy.deepcopy(theirs)
    assert len(flash_attn.replace(ours).swapped) == 4
    x, memory = torch.randn(3, 9, 16, device=device), torch.randn(3, 7, 16, device=device)
    causal = nn.Transformer.generate_square_subsequent_mask(9, device=device)
    padding = torch.arange(7, device=device) >= torch.tensor([[7], [4], [1]], device=device)
    assert_trains_as(theirs, ours, x, memory, tgt_mask=causal, tgt_is_causal=True,
                     memory_key_padding_mask=padding)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(x, memory), theirs.eval()(x, memory), rtol=1e-4, atol=1e-4)


def test_an_optimizer_goes_on(device):
    """One built before, with its state, steps the same parameters after."""
    theirs = encoder(device)
    ours = copy.deepcopy(theirs)
    optimizers = [torch.optim.Adam(model.parameters(), 1e-2) for model in (theirs, ours)]
    x = torch.randn(3, 9, 16, device=device)
    for step in range(4):
        if step == 2:
            report = flash_attn.replace(ours)
        for model, optimizer in zip((theirs, ours), optimizers):
            optimizer.zero_grad()
            (model(x) - x).square().mean().backward()
            optimizer.step()
    assert len(report.swapped) == 2
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-2, atol=1e-2)


class OwnForward(nn.MultiheadAttention):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


def every_module_to_leave():
    modules = {name: nn.MultiheadAttention(16, 2) for name in (
        "good", "hook", "pre", "backward", "out", "own", "norm", "parametrized", "parametrized_out")}
    modules["hook"].register_forward_hook(lambda *_: None)
    modules["pre"].register_forward_pre_hook(lambda *_: None)
    modules["backward"].register_full_backward_hook(lambda *_: None)
    modules["out"].out_proj.register_forward_hook(lambda *_: None)
    modules["own"].forward = lambda *args: args
    parametrize = nn.utils.parametrize.register_parametrization
    parametrize(modules["parametrized"], "in_proj_weight", nn.Identity())
    parametrize(modules["parametrized_out"].out_proj, "weight", nn.Identity())
    nn.utils.spectral_norm(modules["norm"], "in_proj_weight")
    modules.update(subclass=OwnForward(16, 2), ours=MultiheadAttention(16, 2),
                   wider=nn.MultiheadAttention(16, 2, dtype=torch.float64),
                   largest=nn.MultiheadAttention(1028, 2, device="meta"),
                   quantizable=torch.ao.nn.quantizable.MultiheadAttention(16, 2))
    return nn.ModuleDict(modules)


def test_what_is_left_and_why():
    model = every_module_to_leave()
    before = {name: type(module) for name, module in model.named_modules()}
    report = flash_attn.replace(model)
    assert report.swapped == ["good"]
    expected = dict(
        hook="hooks", pre="hooks", backward="hooks", out="hooks", norm="hooks", own="forward of its own",
        parametrized="parametrizations", parametrized_out="parametrizations", subclass="OwnForward",
        ours="already", wider="float64", largest="514", quantizable="quantizable")
    assert report.left.keys() == expected.keys()
    for name, words in expected.items():
        assert words in report.left[name] and f"{name}: {report.left[name]}" in repr(report)
    after = {name: type(module) for name, module in model.named_modules()}
    assert {name for name in before if before[name] is not after[name]} == {"good"}


def test_replace_a_module_itself_and_shared_ones():
    module = nn.MultiheadAttention(16, 2)
    report = flash_attn.replace(module)
    assert report.swapped == [""] and "(the model)" in repr(report)
    assert type(module) is MultiheadAttention
    shared = nn.MultiheadAttention(16, 2)
    model = nn.ModuleList([shared, nn.Sequential(shared)])
    assert flash_attn.replace(model).swapped == ["0"]
    assert type(model[1][0]) is MultiheadAttention
    with pytest.raises(ArgumentTypeError, match="torch.nn.Module"):
        flash_attn.replace([module])


def test_undo_is_all_or_nothing():
    model = encoder()
    report = flash_attn.replace(model)
    attention = model.layers[1].self_attn
    nn.utils.parametrize.register_parametrization(attention, "in_proj_weight", nn.Identity())
    with pytest.raises(ArgumentValueError, match="layers.1.self_attn"):
        report.undo()
    assert type(model.layers[0].self_attn) is MultiheadAttention
    nn.utils.parametrize.remove_parametrizations(attention, "in_proj_weight")
    report.undo()
    assert type(attention) is type(model.layers[0].self_attn) is nn.MultiheadAttention
