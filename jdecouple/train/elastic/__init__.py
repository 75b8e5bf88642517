"""Elastic stages: each a process of its own, so that the loss of one stops only that one."""

from jdecouple.train.elastic.run import train_stage

__all__ = ["train_stage"]
