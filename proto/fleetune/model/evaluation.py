"""Loss, accuracy and macro F1 of a model on rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from fleetune.child.entry import is_out_of_memory
from fleetune.errors import NotFiniteError
from fleetune.model import accelerator as accelerators
from fleetune.model.batches import IGNORED, Batch, Example, collate
from fleetune.model.lora import AdaptedModel
from fleetune.model.recipe import CAUSAL_LM, CLASSIFICATION

BATCH_ROWS = 32


@dataclass(frozen=True)
class Measured:
    """Metrics by name, the number of rows, and of loss terms (rows for classes, target tokens for language models)."""

    metrics: Mapping[str, float]
    rows: int
    loss_terms: int


def evaluate(
    adapted: AdaptedModel,
    items: Sequence[Example],
    batch_rows: int = BATCH_ROWS,
    on_progress: Callable[[int, int], None] | None = None,
) -> Measured:
    """Measures `items` without dropout and without gradients; leaves the model in the mode that it was in.

    Loss is the mean over loss terms. Accuracy counts rows for classification and unmasked target tokens for language models.
    Macro F1 is the mean over the classes that occur in the rows or among the predictions. Halves the batch where memory is short.
    Raises NotFiniteError when the loss is NaN or Inf.
    """
    # Rows of like length are measured together: less padding, the same sums.
    ordered = sorted(items, key=lambda item: len(item.ids), reverse=True)
    was_training = adapted.model.training
    adapted.model.eval()
    sums = _Sums(len(adapted.recipe.labels))
    done = 0
    try:
        with torch.inference_mode():
            while done < len(ordered):
                some = ordered[done : done + batch_rows]
                try:
                    _measure(adapted, some, sums)
                except (RuntimeError, MemoryError) as error:
                    if not is_out_of_memory(error) or batch_rows == 1:
                        raise
                    batch_rows = (batch_rows + 1) // 2
                    accelerators.release_memory(adapted.accelerator)
                    continue
                done += len(some)
                if on_progress is not None:
                    on_progress(done, len(ordered))
    finally:
        adapted.model.train(was_training)
    return _finish(adapted, sums, len(ordered))


class _Sums:
    """Running counts. Owned by one call of `evaluate`."""

    def __init__(self, classes: int) -> None:
        self.loss = 0.0
        self.loss_terms = 0
        self.correct = 0
        self.confusion = torch.zeros((classes, classes), dtype=torch.int64)


def _measure(adapted: AdaptedModel, some: Sequence[Example], sums: _Sums) -> None:
    batch = collate(some, adapted.tokenizer.pad_token_id, adapted.accelerator.device)
    output = adapted.model(**batch)
    terms = sum(item.loss_terms for item in some)
    loss = float(output.loss) * terms
    truth, predicted = _compared(adapted, batch, output.logits)
    correct = int((truth == predicted).sum())
    if adapted.recipe.model_task == CLASSIFICATION:
        classes = sums.confusion.shape[0]
        sums.confusion += torch.bincount(truth * classes + predicted, minlength=classes * classes).reshape(classes, classes).cpu()
    sums.loss += loss
    sums.loss_terms += terms
    sums.correct += correct


def _compared(adapted: AdaptedModel, batch: Batch, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    predicted, truth = logits.argmax(-1), batch["labels"]
    if adapted.recipe.model_task == CLASSIFICATION:
        return truth, predicted
    if adapted.recipe.model_task == CAUSAL_LM:
        predicted, truth = predicted[:, :-1], truth[:, 1:]
    counted = truth != IGNORED
    return truth[counted], predicted[counted]


def _finish(adapted: AdaptedModel, sums: _Sums, rows: int) -> Measured:
    terms = max(sums.loss_terms, 1)
    loss = sums.loss / terms
    if loss != loss or loss in (float("inf"), float("-inf")):
        raise NotFiniteError(
            f"The loss over {rows} evaluation rows is {loss}.", "Lower the learning rate, or use dtype float32 or bfloat16."
        )
    metrics = {"loss": loss, "accuracy": sums.correct / terms}
    if adapted.recipe.model_task == CLASSIFICATION:
        metrics["macro_f1"] = macro_f1(sums.confusion)
    return Measured(metrics, rows, sums.loss_terms)


def macro_f1(confusion: torch.Tensor) -> float:
    """Mean F1 over the classes that occur; `confusion` is (true, predicted) counts of shape (classes, classes)."""
    hits = confusion.diagonal().double()
    occurring = (confusion.sum(0) + confusion.sum(1)).double()
    present = occurring > 0
    return float((2 * hits[present] / occurring[present]).mean()) if bool(present.any()) else 0.0
