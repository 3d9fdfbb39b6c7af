"""llmslim makes a Hugging Face model smaller and faster and proves what that cost."""

__version__ = "0.1.0"
