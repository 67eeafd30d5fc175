"""Kernels in C++ that decode small Llamas on a CPU, compiled on the user's machine at first use.

``build.py`` compiles the sources beside it and opens the result, ``weights.py`` lays a model's weights
out, ``stepper.py`` is the :class:`~puna.model.stepper.Stepper` on top of them. The kernels sum every
number in one fixed order, so a text's results are the same bits alone, in any batch and in any cutting.
"""
