"""Networks: functions from a shape and a number of outputs to a module. None keeps batch statistics."""
