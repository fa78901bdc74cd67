"""What a fine-tuning run came to."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .accuracy import Accuracy


@dataclass(frozen=True)
class Result:
    """What a run came to: steps taken, the mean loss of the last ten, the accuracy of the model kept and original.

    ``kept`` is the step whose model is the output, and ``early`` whether the run ended since it was as accurate as the
    original.
    """

    output: Path
    steps: int
    loss: float | None
    evaluation: Accuracy | None
    original: Accuracy | None
    kept: int
    early: bool

    def __str__(self) -> str:
        parts = [f"{self.steps} steps"]
        if self.loss is not None:
            parts.append(f"loss {self.loss:.4f}")
        if self.evaluation is not None:
            known = "" if self.original is None else f" (original {self.original.top1:.2f} %)"
            best = "" if self.kept == self.steps else f" after step {self.kept}, the best"
            parts.append(f"top-1 {self.evaluation.top1:.2f} %{known}{best}")
        if self.early:
            parts.append("ended as accurate as the original")
        return ", ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain data."""
        found = {"eval": self.evaluation, "original": self.original}
        told = {name: None if value is None else value.to_dict() for name, value in found.items()}
        return {"output": str(self.output), "steps": self.steps, "kept": self.kept, "loss": self.loss, **told}
