"""What the tutorials use beside the library: quotes of its source code, and a check for every exercise.

`check_03.exercise_3_1(answer)` checks an answer to exercise 3.1 of tutorial 3.
"""

from glmlens.course.quote_source import Quote, source

__all__ = ["Quote", "source"]
