"""Writes benchmarks/results/mesh.json: what `minillm estimate --gpus` computes for pairs that people distil.

Computed from the shapes of published models, the counted bytes and operations of one process and the rates in
minillm/model/forecast.py; no GPU is involved.

python benchmarks/mesh_forecast.py
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from transformers import LlamaConfig, Qwen2Config

from minillm.config.recipe import recipe_from
from minillm.model.forecast import SPARE, forecasts, parse_mesh

RESULT = Path(__file__).parent / "results" / "mesh.json"
MODELS = {
    "Qwen2.5 1.5B": Qwen2Config(
        vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
        num_key_value_heads=2, tie_word_embeddings=True,
    ),
    "Qwen2.5 7B": Qwen2Config(
        vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4,
    ),
    "Llama 3 8B": LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8,
    ),
    "Llama 3 70B": LlamaConfig(
        vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8,
    ),
}  # fmt: skip
PAIRS = (("Qwen2.5 7B", "Qwen2.5 1.5B"), ("Llama 3 70B", "Llama 3 8B"))
STAGES = {
    "on-policy": {"method": "gkd", "rollout": {"on_policy": 1.0}, "loss": {"divergence": "reverse_kl"}},
    "MiniLLM": {"method": "minillm", "rollout": {"batch_size": 512, "alpha": 0.2}, "objective": {"pt_weight": 0.0}},
}
SHARED = {
    "model": {"compute_dtype": "bfloat16", "recompute": True},
    "data": {"train": "prompts.jsonl", "max_prompt_length": 512, "max_response_length": 512},
    "rollout": {"max_new_tokens": 512},
    "optim": {"batch_size": 128, "micro_batch_size": 2},
}
MESHES = ("8xh100", "2x8xh100", "8x8xh100")


def rows() -> list[dict]:
    """For each pair, method and mesh: the first placement that fits, in GB and seconds; none where nothing does."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for name, config in MODELS.items():
            config.dtype = "bfloat16"
            config.save_pretrained(Path(folder) / name)
        for teacher, student in PAIRS:
            models = {"model": {"teacher": f"{folder}/{teacher}", "student": f"{folder}/{student}"}}
            recipe = recipe_from("mesh", {**SHARED, "stages": STAGES}, models)
            for mesh in MESHES:
                gpus = parse_mesh(mesh)
                for stage, config in recipe.stages.items():
                    fits = [f for f in forecasts(gpus, recipe.run, config) if f.memory <= SPARE * gpus.gpu.memory]
                    row = {"teacher": teacher, "student": student, "stage": stage, "mesh": mesh}
                    if fits:
                        row |= {"placement": fits[0].placement._asdict()}
                        row |= {"gigabytes": round(fits[0].memory / 1e9, 1)}
                        row |= {"seconds": round(fits[0].step, 2), "decoding": round(fits[0].decode, 2)}
                    found.append(row)
    return found


if __name__ == "__main__":
    RESULT.write_text(json.dumps({"command": "python benchmarks/mesh_forecast.py", "rows": rows()}, indent=1) + "\n")
    print(RESULT)
