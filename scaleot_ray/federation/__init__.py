"""A run of one model owner and many data owners on Ray, on one machine or on the nodes of a cluster.

From the bottom: ``folder``, ``resources``, ``rounds`` (what is kept), ``roles`` (the actors), ``driver`` (who leads
them), and ``run``, where it begins.
"""
