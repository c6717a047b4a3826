"""
Records what trainings compute, so that a redesign can show that it computes the same.

    python tests/scripts/digits.py digits.json            # before: writes the record
    python tests/scripts/digits.py digits.json --compare  # after: compares with it, exit code 1 where a digit differs

Each record is a training of three steps on a tiny pipeline: all logged numbers, those of an evaluation, and a hash of
the final weights. Methods x full and LoRA x live, cached features, precomputed reference errors x float32 and bf16
autocast x windows; and, one of a kind each, flow matching, SDXL, buckets, ratios of labels, loss types and guards.
"""

import argparse
import hashlib
import itertools
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig


sys.path.insert(0, str(Path(__file__).parents[2]))

from tests import test_buckets, tiny
from tests.conftest import pairs, unpaired
from tests.methods import METHODS, make_trainer


CACHING: dict[str, dict[str, Any]] = {
    "live": {},
    "cached": {"cache_features": True},
    "precomputed": {"cache_features": True, "precompute_ref_log_probs": True},
}
TIMES = ("runtime", "per_second", "total_flos", "time")
SPECIAL: dict[str, dict[str, Any]] = {
    "kto risk_seeking": {"utility": "risk_seeking"},
    "kto loss_averse": {"utility": "loss_averse"},
    "kto apo": {"loss_type": "apo_zero_unpaired"},
    "kto mismatched": {"reference_point": "mismatched"},
    "kto natural order": {"desirable_ratio": None},
    "rpo inside": {"weight_placement": "inside"},
    "rpo exclude": {"diagonal": "exclude"},
    "rpo window timestep": {"timestep_sharing": "window", "window": "step"},
    "dpo hinge": {"loss_type": "hinge"},
    "dpo ipo": {"loss_type": "ipo"},
    "dpo guard": {"winner_guard": 0.9},
    "dpo ema": {"ema_decay": 0.9},
    "dpo sync": {"sync_ref_model": True, "ref_model_sync_steps": 2},
    "dpo min_snr": {"weighting": "min_snr"},
    "sft flips": {"random_flip": True, "center_crop": False},
}
FAMILIES = {"flow": tiny.tiny_stable_diffusion_3, "sdxl": tiny.tiny_stable_diffusion_xl}


def runs() -> dict[str, tuple[str, dict[str, Any]]]:
    """Name -> method and options of each training."""
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for method, lora, caching, bf16 in itertools.product(METHODS, (False, True), CACHING, (False, True)):
        if method == "sft" and caching == "precomputed":  # it has no reference
            continue
        for window in ("device", "batch", "step") if method in ("kto", "rpo") else (None,):
            options = {"lora": lora, "bf16": bf16, **CACHING[caching]} | ({"window": window} if window else {})
            name = f"{method} {'lora' if lora else 'full'} {caching} {'bf16' if bf16 else 'fp32'} {window or ''}"
            found[name.strip()] = (method, options)
    for name, options in SPECIAL.items():
        found[name] = (name.split()[0], options)
    for method in METHODS:
        found |= {f"{method} {family}": (method, {"family": family}) for family in FAMILIES}
        found[f"{method} buckets"] = (method, {"buckets": True})
    return found


def digits(method: str, options: dict[str, Any]) -> dict[str, Any]:
    """Logged numbers as `float.hex`, and a hash of the trained weights, of one training."""
    options = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2} | options
    single = method == "kto"
    if options.pop("buckets", False):
        data, evaluation = ((test_buckets.unpaired if single else test_buckets.pairs)(rows) for rows in (40, 7))
        options["resolution"] = test_buckets.RESOLUTION
    else:
        data, evaluation = ((unpaired if single else pairs)(rows) for rows in (12, 7))
    build = FAMILIES.get(options.pop("family", ""), tiny.tiny_stable_diffusion)
    lora = LoraConfig(r=4, lora_alpha=8) if options.pop("lora", False) else None
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(method, build(), folder, data, eval_dataset=evaluation, peft_config=lora, **options)
        trainer.train()
        entries = [*trainer.state.log_history, trainer.evaluate()]
    numbers = [
        {k: float(v).hex() for k, v in entry.items() if not any(word in k for word in TIMES)} for entry in entries
    ]
    digest = hashlib.sha256()
    for name, parameter in sorted(trainer.model.named_parameters()):
        if parameter.requires_grad:
            digest.update(name.encode() + parameter.detach().contiguous().numpy().tobytes())
    return {"numbers": numbers, "weights": digest.hexdigest()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Record or compare what trainings compute.")
    parser.add_argument("file", type=Path)
    parser.add_argument("--compare", action="store_true")
    parser.add_argument("--only", default="", help="names that contain this text")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = {name: digits(*run) for name, run in runs().items() if args.only in name}
    if not args.compare:
        args.file.write_text(json.dumps(found, indent=1) + "\n")
        print(f"{len(found)} trainings recorded in {args.file}.")
        return
    recorded = json.loads(args.file.read_text())
    other = [name for name in found if recorded.get(name) != found[name]]
    print(f"{len(found)} trainings compared, {len(other)} differ: {other}")
    raise SystemExit(bool(other))


if __name__ == "__main__":
    main()
