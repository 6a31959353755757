"""Fine-tuning on NegEx beside transformers in torch: same weights, order, epochs, float32, cores.

    python tests/benchmarks/finetune.py --data NEGEX_FOLDER --tokenizer DIR [--json FILE]

A seeded ModernBERT of 6 layers and width 384 (nothing can be downloaded here), head included. torch
pads each batch to its longest text; here a batch is packed into one row. Both go through
`python -m train finetune`; a run's seconds hold its steps, evaluations and compilations.
"""

import argparse
import json
import os
import pathlib
import tempfile
from datetime import UTC, datetime

import machine

os.environ.setdefault("JAX_PLATFORMS", "cpu")


def start(tokenizer: str, folder: pathlib.Path, labels: int) -> None:
    """A checkpoint of seeded weights, made by transformers."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.ModernBertConfig(
        num_hidden_layers=6, hidden_size=384, intermediate_size=576, num_attention_heads=6,
        num_labels=labels, classifier_pooling="mean",
    )  # fmt: skip
    transformers.ModernBertForSequenceClassification(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((pathlib.Path(tokenizer) / name).read_bytes())


def main() -> None:
    """See the module's docstring."""
    import jax
    import torch
    import transformers

    from train.finetune.config import FinetuneConfig
    from train.finetune.run import finetune
    from train.finetune.tasks import task_named

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True, help="folder of NegEx's annotations")
    parser.add_argument("--tokenizer", required=True, help="folder of ModernBERT's tokenizer")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args()
    labels = task_named("negex").load(pathlib.Path(args.data)).labels
    record: dict = {
        "command": "python tests/benchmarks/finetune.py",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": machine.cpu(),
        "versions": {
            "jax": jax.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    with tempfile.TemporaryDirectory() as made:
        folder = pathlib.Path(made)
        start(args.tokenizer, folder / "start", len(labels))
        for backend in ("jax", "torch"):
            before = os.getloadavg()[0]
            finetune(
                FinetuneConfig(
                    "negex", args.data, str(folder / "start"), str(folder / backend), backend,
                    seeds=(42,), learning_rate=3e-4, epochs=args.epochs, save_model=False,
                )
            )  # fmt: skip
            (file,) = (folder / backend).rglob("result.json")
            result = json.loads(file.read_text())
            record[backend] = {
                "seconds": result["seconds"],
                "median_step_seconds": result["median_step_seconds"],
                "test_weighted_f1": result["test"]["weighted_f1"],
                "last_loss": result["losses"][-1],
                "losses": result["losses"],
                "load_average_before": before,
            }
    for name, key in (("ratio", "seconds"), ("ratio_of_steps", "median_step_seconds")):
        record[name] = record["torch"][key] / record["jax"][key]
    pairs = zip(record["jax"].pop("losses"), record["torch"].pop("losses"), strict=True)
    apart = [abs(a - b) for a, b in pairs]
    steps = len(apart) // args.epochs
    record["losses_apart"] = {"first epoch": max(apart[:steps]), "all": max(apart)}
    print(json.dumps(record, indent=2))
    if args.json:
        args.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
