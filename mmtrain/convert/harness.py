"""Evaluates an exported model with EleutherAI's lm-evaluation-harness, which downloads its data. Needs the extra
mm[eval]."""

from pathlib import Path

from mmdata.errors import UsageError, needs
from mmtrain.distributed import choose_device


def run(model_dir: Path, tasks: list[str], *, is_chat: bool, limit: int | None = None) -> dict[str, dict[str, float]]:
    """Evaluate the Hugging Face model in `model_dir` and return {task or group of tasks: {metric: value}}. Raise
    UsageError if the harness is not installed or a task is unknown. tasks: names that the harness knows, or paths of
    task files. is_chat: apply the model's chat template to each question. limit: the most questions per task; None for
    all."""
    with needs("--lm-eval needs EleutherAI's harness", "eval"):
        import lm_eval  # pyright: ignore[reportMissingImports]
        from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]
        from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    manager = TaskManager()
    available = set(manager.all_tasks)
    if unknown := [task for task in tasks if task not in available and not Path(task).is_file()]:
        raise UsageError(
            f"the harness has no task {', '.join(unknown)}",
            "`lm_eval ls tasks` lists them; a task's .yaml file works too",
        )
    model = HFLM(pretrained=str(model_dir), dtype="float32", batch_size=8, device=str(choose_device("auto")))
    evaluation = lm_eval.simple_evaluate(
        model=model,
        tasks=list(tasks),
        limit=limit,
        apply_chat_template=is_chat,
        log_samples=False,
        task_manager=manager,
    )
    assert evaluation is not None
    return {
        task: {
            metric.removesuffix(",none"): float(value)
            for metric, value in figures.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }
        for task, figures in {**evaluation["results"], **evaluation.get("groups", {})}.items()
    }
