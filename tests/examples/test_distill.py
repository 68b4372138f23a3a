"""The example of the Python API brings the student nearer to its teacher."""

import distill
import eager
import pytest
from transformers import AutoModelForCausalLM


def test_the_student_comes_nearer_to_its_teacher(tmp_path):
    distill.write_models_and_data(tmp_path)
    run = distill.distill(tmp_path)
    assert list(run.evaluations) == ["start", "warm-up", "minillm", "teacher"]
    kl = {
        stage: found.means["reverse_kl/own_samples"].mean
        for stage, found in run.evaluations.items()
        if stage != "teacher"
    }
    assert kl["minillm"] < kl["warm-up"] < kl["start"]
    assert run.summary["changes"]["minillm"]["reverse_kl/own_samples"]["mean"] == pytest.approx(
        kl["minillm"] - kl["warm-up"]
    )
    AutoModelForCausalLM.from_pretrained(run.model_path)


def test_runs_as_a_script():
    eager.run_script("distill")
