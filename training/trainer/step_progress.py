"""How far a training by transformers' `Trainer` is: its own printing off, and ours on."""

from typing import Any

from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback

from peft_psr.training.progress import Progress


def silence(trainer: Trainer) -> None:
    """Take away what a Trainer prints and draws by itself."""
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)


class StepProgress(TrainerCallback):
    """Says which optimiser step a training of `title` is at; see `Progress`."""

    def __init__(self, title: str) -> None:
        self.title = title
        self._progress: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin where a checkpoint has ended."""
        self._progress = Progress(self.title, state.max_steps, state.global_step, unit="steps")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """One more."""
        self._progress.advance()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Show the newest losses."""
        for name in ("loss", "eval_loss"):
            if name in (logs or {}):
                self._progress.note = f"{name} {logs[name]:.4g}"

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The last line."""
        self._progress.close()
