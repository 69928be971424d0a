"""`dudi plan`: whether a recipe fits, what its step costs, and what to change, before it runs."""

from dudi.planning.plan import Lengths, RunPlan, plan_run, read_options

__all__ = ["Lengths", "RunPlan", "plan_run", "read_options"]
