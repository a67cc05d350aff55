"""Tasks by name. A new one is one file and one line here."""

from core.errors import SettingsError
from core.options import parse_assignments
from core.reference import is_reference, load_class, users_code
from core.settings import Settings
from task.images import ImageTask
from task.interface import Facts, Task
from task.table import TableTask
from task.text import TextTask

TASKS: dict[str, type[Task]] = {"images": ImageTask, "text": TextTask, "table": TableTask}


def make_task(settings: Settings, facts: Facts | None = None) -> Task:
    """Make the task that the settings name.

    Parameters
    ----------
    settings : Settings
        Of the run.
    facts : mapping, optional
        On a device: what the server says.

    Raises
    ------
    SettingsError
        If there is no such task, it is no `Task`, or its options are not allowed.

    Examples
    --------
    >>> type(make_task(Settings(task="images"))).__name__
    'ImageTask'
    """
    kind = task_class(settings.task)
    with users_code(f"task: {settings.task!r} cannot be made"):
        options = kind.Options.read(parse_assignments(settings.task_options), "task-options: ")
        return kind(settings, options, facts)


def task_class(name: str) -> type[Task]:
    """Return the class of a task by its name, or by ``package.module:Class``.

    Raises
    ------
    SettingsError
        If there is none.
    """
    if not is_reference(name):
        if name not in TASKS:
            allowed = ", ".join([*TASKS, "package.module:Class"])
            raise SettingsError(f"task: there is no {name!r}; allowed: {allowed}")
        return TASKS[name]
    found = load_class("task", name, Task, "task.Task")  # type: ignore[type-abstract]
    if missing := sorted(found.__abstractmethods__):
        raise SettingsError(f"task: {name!r} does not define {' and '.join(missing)}")
    return found
