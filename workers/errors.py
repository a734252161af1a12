"""Exceptions of the worker side, each with the class the driver answers by. Standard library only.

WorkerError
├── InputError        wrong or missing input (model file, text, unknown statistic); USER
├── Unreachable       a hub that does not answer now; INFRASTRUCTURE
├── UnsupportedModel  a model family or layer that cannot be quantized, with the reason; USER
└── NumericalError    NaN or infinite weights or results, a Hessian no damping repairs; NUMERICAL
"""

from __future__ import annotations

from typing import ClassVar

from workers.request import ErrorClass


class WorkerError(Exception):
    error_class: ClassVar[ErrorClass] = ErrorClass.INTERNAL


class InputError(WorkerError):
    error_class = ErrorClass.USER


class Unreachable(WorkerError):
    error_class = ErrorClass.INFRASTRUCTURE


class UnsupportedModel(WorkerError):
    error_class = ErrorClass.USER


class NumericalError(WorkerError):
    error_class = ErrorClass.NUMERICAL
