"""What the tutorials need beside the library: passages of its source, and a check for every exercise.

`check_03.exercise_3_1(answer)` looks at an answer of tutorial 3.
"""

from glmlens.course.quote import Quote, source

__all__ = ["Quote", "source"]
