"""What is learned: tasks, their data, local training and evaluation. Independent of Flower."""

from task.examples import DatasetExamples, Examples, Inputs, Measures, TensorExamples, TensorInputs
from task.interface import Data, Facts, Node, Task

__all__ = [
    "Data",
    "DatasetExamples",
    "Examples",
    "Facts",
    "Inputs",
    "Measures",
    "Node",
    "Task",
    "TensorExamples",
    "TensorInputs",
]
