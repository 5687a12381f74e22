"""streamlearn: online continual learning from Kafka topics, with live figures of what is remembered."""

__version__ = "0.1.0"
