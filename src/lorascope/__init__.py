"""lorascope trains LoRA candidates under equal conditions and shows with evidence which one to keep."""

__version__ = "0.1.0"
