"""An exported model through EleutherAI's evaluation harness (the extra `mm[eval]`), which fetches its tasks itself."""

from pathlib import Path
from typing import Any

import torch

from mmdata.errors import UsageError


def run(model_dir: Path, tasks: list[str], *, is_chat: bool, limit: int | None = None) -> dict[str, dict[str, float]]:
    """The figures of each task, by metric, of the Hugging Face model in `model_dir`; UsageError for an unknown task.

    `limit`: only so many questions a task. With `is_chat` each question is put through the model's chat template.
    """
    try:
        import lm_eval  # pyright: ignore[reportMissingImports]
        from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]
        from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UsageError(f"--lm-eval needs EleutherAI's harness ({error})", "pip install 'mm-toolkit[eval]'") from error

    manager = TaskManager()
    known = set(manager.all_tasks)
    if unknown := [task for task in tasks if task not in known and not Path(task).is_file()]:
        raise UsageError(
            f"the harness has no task {', '.join(unknown)}",
            "`lm_eval ls tasks` lists them; a task's .yaml file works too",
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = HFLM(pretrained=str(model_dir), dtype="float32", batch_size=8, device=device)
    found = lm_eval.simple_evaluate(
        model=model,
        tasks=list(tasks),
        limit=limit,
        apply_chat_template=is_chat,
        log_samples=False,
        task_manager=manager,
    )
    assert found is not None
    results: dict[str, dict[str, Any]] = {**found["results"], **found.get("groups", {})}
    return {
        task: {metric.removesuffix(",none"): float(value) for metric, value in figures.items() if _is_number(value)}
        for task, figures in results.items()
    }


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
