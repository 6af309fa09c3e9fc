"""Why an arm wins or fails: what can be seen of it beside its pictures."""
