"""The functions that build the parts of some groups, by their Python paths: they are not imported to check options."""

# Their keyword-only parameters are options of every optimizer and schedule.
BUILDERS = {
    "optimizer": "odcheap.training.optim.build_optimizer",
    "scheduler": "odcheap.training.optim.build_scheduler",
}
