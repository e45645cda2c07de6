"""The demo: a coordinator and agents on one machine, and the data they train on."""
