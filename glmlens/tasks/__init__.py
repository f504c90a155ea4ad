"""Tasks: prompts with known answers, counterfactual prompts and named positions, under any tokenizer."""

from glmlens.tasks.formal import addition, brackets, docstring, greater_than, induction, successors
from glmlens.tasks.language import agreement, facts, ioi, pronouns, sentiment
from glmlens.tasks.task import Example, Examples, Item, Task, TaskError, TextWithSpans, item

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        ioi, induction, facts, agreement, greater_than, docstring, pronouns, successors, brackets, addition, sentiment,
    )
}  # fmt: skip

__all__ = [
    "TASKS",
    "Example",
    "Examples",
    "Item",
    "Task",
    "TaskError",
    "TextWithSpans",
    "addition",
    "agreement",
    "brackets",
    "docstring",
    "facts",
    "greater_than",
    "induction",
    "ioi",
    "item",
    "pronouns",
    "sentiment",
    "successors",
]  # fmt: skip
