import math

import pytest
import torch

from minillm.config.schema import EvalConfig
from minillm.data.examples import Example, Record
from minillm.evaluation.calibration import most_likely, next_token, options, reliability
from minillm.model.head import CausalLM, Output


def test_by_hand():
    confidence = torch.tensor([0.95, 0.85, 0.9, 0.15])
    correct = torch.tensor([True, False, True, False])
    found = reliability(confidence, correct)
    # bins (0.8, 0.9]: two, mean 0.875, half right; (0.9, 1]: one, right; (0.1, 0.2]: one, wrong
    assert found.ece == pytest.approx((2 * 0.375 + 0.05 + 0.15) / 4)
    assert found.accuracy == 0.5 and found.count == 4
    assert [b.count for b in found.bins] == [0, 1, 0, 0, 0, 0, 0, 0, 2, 1]
    assert found.bins[8].accuracy == 0.5 and math.isnan(found.bins[0].confidence)


def test_the_ends_have_bins():
    found = reliability(torch.tensor([0.0, 1.0]), torch.tensor([False, True]))
    assert found.ece == 0 and found.bins[0].count == found.bins[9].count == 1


def test_against_torchmetrics():
    metrics = pytest.importorskip("torchmetrics.functional.classification")
    g = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(500, 7, generator=g)
    labels = torch.randint(7, (500,), generator=g)
    probabilities = logits.softmax(-1)
    top = probabilities.max(-1)
    expected = metrics.multiclass_calibration_error(probabilities, labels, num_classes=7, n_bins=10, norm="l1")
    assert reliability(top.values, top.indices == labels).ece == pytest.approx(expected.item(), abs=1e-6)


def test_what_is_no_confidence_is_refused():
    with pytest.raises(ValueError, match="N > 0"):
        reliability(torch.tensor([]), torch.tensor([]))
    with pytest.raises(ValueError, match="between 0 and 1"):
        reliability(torch.tensor([-3.0]), torch.tensor([True]))


@pytest.mark.parametrize("head", ["fused", "logits"])
@torch.no_grad()
def test_next_tokens_against_plain_torch(make_llama, head):
    model = make_llama(2)
    lm = CausalLM(model, head)
    examples = [Example(Record([], "x"), [1, 2, 3], [4, 5, 0]), Example(Record([], "y"), [7], [8, 0])]
    confidence, correct, losses = [], [], []
    for example in examples:
        ids = torch.tensor([example.prompt + example.response])
        log_q = model(ids).logits[0, len(example.prompt) - 1 : -1].double().log_softmax(-1)
        top = log_q.exp().max(-1)
        targets = torch.tensor(example.response)
        confidence.append(top.values)
        correct.append(top.indices == targets)
        losses.append(-log_q.gather(-1, targets[:, None]).sum().item())
    expected = reliability(torch.cat(confidence), torch.cat(correct))
    found, loss = next_token(lm, examples, EvalConfig(batch_size=8))
    assert found.ece == pytest.approx(expected.ece, abs=1e-5) and found.accuracy == expected.accuracy
    assert loss.totals.tolist() == pytest.approx(losses, rel=1e-5)


@torch.no_grad()
def test_the_most_likely_token_in_pieces(make_llama, monkeypatch):
    lm = CausalLM(make_llama(2))
    states = torch.randn(11, 32)  # 11 rows in pieces of 4
    whole = most_likely(lm, Output(states, lm.head))
    monkeypatch.setattr(CausalLM, "vocab_size", 2**22)
    pieces = most_likely(lm, Output(states, lm.head))
    for a, b in zip(whole, pieces, strict=True):
        torch.testing.assert_close(a, b)


@torch.no_grad()
def test_options_are_chosen_by_the_probability_of_their_tokens(make_llama, tokenizer):
    model = make_llama(2)
    words = ("yes", "no", "perhaps")
    records = [Record([], answer, options=words) for answer in ("no", "yes")]
    examples = [Example(record, [5 + i, 6], [1]) for i, record in enumerate(records)]
    examples.append(Example(Record([], "free text"), [3], [1]))  # a question without options is passed over
    confidence, correct = [], []
    for example in examples[:2]:
        scores = []
        for word in words:
            tokens = tokenizer.encode(word, add_special_tokens=False)
            log_q = model(torch.tensor([[*example.prompt, *tokens]])).logits[0, 1:-1].double().log_softmax(-1)
            scores.append(log_q.gather(-1, torch.tensor(tokens)[:, None]).sum())
        law = torch.stack(scores).softmax(0)
        confidence.append(law.max())
        correct.append(words[int(law.argmax())] == example.record.answer)
    expected = reliability(torch.stack(confidence), torch.tensor(correct))
    found = options(CausalLM(model), tokenizer, examples, EvalConfig(batch_size=4))
    assert found is not None and found.count == 2
    assert found.ece == pytest.approx(expected.ece, abs=1e-5) and found.accuracy == expected.accuracy
    assert options(CausalLM(model), tokenizer, examples[2:], EvalConfig()) is None
