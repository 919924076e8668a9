"""Reads a BERT that Hugging Face's library has saved into the model of this folder.

    bert = read("bert-base-uncased")        # a folder with config.json and model.safetensors
"""
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bert.model import BERT, Config

NAMES = {                                   # module here: theirs
    "tokens": "embeddings.word_embeddings", "positions": "embeddings.position_embeddings",
    "segments": "embeddings.token_type_embeddings", "norm": "embeddings.LayerNorm",
}
BLOCK_NAMES = {                             # within blocks.N and encoder.layer.N
    "attention.project_out": "attention.output.dense", "attention_norm": "attention.output.LayerNorm",
    "feed_forward.project_in": "intermediate.dense", "feed_forward.project_out": "output.dense",
    "feed_forward_norm": "output.LayerNorm",
}
HEAD_NAMES = {
    "head.project": "cls.predictions.transform.dense", "head.norm": "cls.predictions.transform.LayerNorm",
}
EXPECTED = {                                # what the model here is, and a configuration may not change
    "hidden_act": "gelu", "position_embedding_type": "absolute", "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
}


def read(folder, attention="flash"):
    """The model in a folder. Where the file has no head, as a sentence encoder's, it stays untrained."""
    from safetensors.torch import load_file

    settings = json.loads(Path(folder, "config.json").read_text())
    width = settings["hidden_size"]
    for name, value in (EXPECTED | {"intermediate_size": 4 * width}).items():
        if settings.get(name, value) != value:
            raise ValueError(f"{folder} has {name} = {settings[name]}; examples/bert is written for {value}")
    bert = BERT(Config(settings["vocab_size"], settings["max_position_embeddings"],
                       settings["num_hidden_layers"], settings["num_attention_heads"], width,
                       attention=attention))
    weights = translate(load_file(Path(folder, "model.safetensors")), bert.config.layers)
    missing, unexpected = bert.load_state_dict(weights, strict=False)
    if unexpected or any(not name.startswith("head.") for name in missing):
        raise ValueError(f"{folder} holds another model: missing {missing}, unexpected {unexpected}")
    return bert


def translate(theirs, layers):
    """Their weights under the names of this model, which has no pooler and no next-sentence head."""
    theirs = {name.removeprefix("bert."): tensor for name, tensor in theirs.items()}
    names = NAMES | HEAD_NAMES
    for i in range(layers):
        names |= {f"blocks.{i}.{here}": f"encoder.layer.{i}.{there}" for here, there in BLOCK_NAMES.items()}
    weights = {f"{here}.{kind}": theirs[f"{there}.{kind}"] for here, there in names.items()
               for kind in ("weight", "bias") if f"{there}.{kind}" in theirs}
    for i in range(layers):
        for kind in ("weight", "bias"):
            parts = [theirs[f"encoder.layer.{i}.attention.self.{part}.{kind}"]
                     for part in ("query", "key", "value")]
            weights[f"blocks.{i}.attention.project_in.{kind}"] = torch.cat(parts)
    if "cls.predictions.bias" in theirs:
        weights["head.bias"] = theirs["cls.predictions.bias"]
    return weights
