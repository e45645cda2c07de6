"""The history checker: whether what a coordinator has left on disk obeys the promises made to devices and operators."""
