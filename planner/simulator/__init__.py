"""Discrete-event simulation of a cluster: the scheduling core of the live services over simulated workers."""
