"""Whole steps of a run as plain functions on settings and folders: build, tune, plug in, evaluate.

The command line, jobs and Ray actors all call these; none of them knows Ray.
"""
