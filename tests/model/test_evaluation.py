"""Metrics by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fleetune.errors import NotFiniteError
from fleetune.model import batches, evaluation
from support.adapted import adapted, examples
from support.jobs import recipe_message


def test_metrics_do_not_depend_on_the_batch(bert: Path, rows_file: Path) -> None:
    model = adapted(bert, recipe_message())
    items = examples(model, rows_file).items
    whole, single = evaluation.evaluate(model, items, 24), evaluation.evaluate(model, items, 1)
    assert whole.metrics == pytest.approx(dict(single.metrics), abs=1e-5)
    assert (whole.rows, whole.loss_terms) == (24, 24)


def test_loss_and_accuracy_of_classes_are_means_over_rows(bert: Path, rows_file: Path) -> None:
    model = adapted(bert, recipe_message())
    items = examples(model, rows_file).items
    with torch.no_grad():
        logits = torch.cat([model.model(input_ids=torch.tensor([item.ids.tolist()])).logits for item in items])
    truth = torch.tensor([item.label for item in items])
    found = evaluation.evaluate(model, items).metrics
    assert found["loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, truth)), abs=1e-5)
    assert found["accuracy"] == pytest.approx(float((logits.argmax(-1) == truth).float().mean()))


def test_loss_of_language_models_is_a_mean_over_target_tokens(llama: Path, causal_rows: Path) -> None:
    model = adapted(llama, recipe_message("causal-lm", ["q_proj"], mask_prompt=True))
    items = examples(model, causal_rows).items
    losses, terms, hits = 0.0, 0, 0
    with torch.no_grad():
        for item in items:
            assert item.labels is not None
            logits = model.model(input_ids=torch.tensor([item.ids.tolist()])).logits[0, :-1]
            labels = torch.tensor(item.labels.tolist()[1:])
            losses += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
            terms += int((labels != -100).sum())
            hits += int((logits.argmax(-1) == labels).sum())
    found = evaluation.evaluate(model, items, 5)
    assert found.metrics["loss"] == pytest.approx(losses / terms, rel=1e-4)
    assert found.metrics["accuracy"] == pytest.approx(hits / terms)
    assert found.loss_terms == terms


def test_the_model_keeps_its_mode(bert: Path, rows_file: Path) -> None:
    model = adapted(bert, recipe_message())
    model.model.train()
    evaluation.evaluate(model, examples(model, rows_file).items)
    assert model.model.training


def test_progress_ends_with_all_rows(bert: Path, rows_file: Path) -> None:
    heard: list[tuple[int, int]] = []
    model = adapted(bert, recipe_message())
    evaluation.evaluate(model, examples(model, rows_file).items, 10, lambda done, total: heard.append((done, total)))
    assert heard == [(10, 24), (20, 24), (24, 24)]


def test_a_loss_that_is_not_finite_is_an_error(bert: Path, rows_file: Path) -> None:
    model = adapted(bert, recipe_message())
    with torch.no_grad():
        model.parameters[-1].fill_(float("nan"))
    with pytest.raises(NotFiniteError, match="24 evaluation rows"):
        evaluation.evaluate(model, examples(model, rows_file).items)


def test_macro_f1_of_a_hand_solved_table() -> None:
    # Class 0: precision 2/3, recall 1; class 1: precision 1, recall 1/2; class 2 occurs nowhere.
    confusion = torch.tensor([[2, 0, 0], [1, 1, 0], [0, 0, 0]])
    assert evaluation.macro_f1(confusion) == pytest.approx((0.8 + 2 / 3) / 2)


def test_evaluation_halves_its_batch_where_memory_is_short(bert: Path, rows_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(bert, recipe_message())
    items = examples(model, rows_file).items
    whole = evaluation.evaluate(model, items)

    def scarce(some: list[object], pad_id: int, device: torch.device) -> object:
        if len(some) > 4:
            raise MemoryError
        return batches.collate(some, pad_id, device)  # type: ignore[arg-type]  # examples

    monkeypatch.setattr(evaluation, "collate", scarce)
    assert evaluation.evaluate(model, items).metrics == pytest.approx(dict(whole.metrics), abs=1e-5)
