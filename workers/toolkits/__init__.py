"""Toolkits of others as makers of codes, each in an environment of its own.

The quantize stage starts `<environment>/bin/python -m workers.toolkits request.json` (`launch`), which runs the toolkit on the same
checkpoint and the same calibration tokens and writes stored tensors (`job`, and one module per toolkit); the stage then
walks the blocks as for any method. What runs inside a toolkit's environment needs torch, transformers, safetensors and the
toolkit, and nothing else of bitgrid's dependencies.
"""
