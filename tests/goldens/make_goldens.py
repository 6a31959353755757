"""Makes tests/goldens/tiny: a seeded checkpoint by transformers in HF's layout, and its numbers.

    python tests/goldens/make_goldens.py

With them, parity is also proved where torch is absent. Needs torch and transformers.
"""

import json
import pathlib

import numpy as np
import torch
import transformers

FOLDER = pathlib.Path(__file__).parent / "tiny"


def main() -> None:
    """Writes config.json, model.safetensors, expected.npz and versions.json."""
    torch.manual_seed(20)
    config = transformers.ModernBertConfig(
        vocab_size=61, hidden_size=16, intermediate_size=12, num_hidden_layers=5,
        num_attention_heads=2, local_attention=8, pad_token_id=2, bos_token_id=0, cls_token_id=0,
        eos_token_id=1, sep_token_id=1,
    )  # fmt: skip
    model = transformers.ModernBertForMaskedLM(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn_like(p) * 0.2 + (name.endswith("norm.weight")))
    rng = np.random.default_rng(20)
    ids = rng.integers(3, 61, (2, 30))
    mask = np.ones_like(ids)
    mask[1, 21:] = 0
    labels = np.where((rng.random(ids.shape) < 0.3) & (mask == 1), ids, -100)
    t = torch.tensor
    out = model(t(ids), t(mask), labels=t(labels), output_hidden_states=True)
    out.loss.backward()
    model.save_pretrained(FOLDER)
    np.savez_compressed(
        FOLDER / "expected.npz",
        input_ids=ids,
        attention_mask=mask,
        labels=labels,
        logits=out.logits.detach(),
        loss=out.loss.detach(),
        hidden_states=np.stack([h.detach() for h in out.hidden_states]),
        **{f"grad:{k}": p.grad for k, p in model.named_parameters()},
    )
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    (FOLDER / "versions.json").write_text(json.dumps(versions, indent=2) + "\n")


if __name__ == "__main__":
    main()
