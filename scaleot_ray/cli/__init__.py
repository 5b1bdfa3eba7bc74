"""The command line: one file per command, thin over :mod:`scaleot_ray.stages` and :mod:`scaleot_ray.federation`.

Nothing here is imported by the rest of the package. Modules load torch, transformers and Ray inside
their functions, so that ``scaleot --help`` answers at once.
"""
