"""Synthesis of training data: a generator makes clips from prompts, a captioner describes them, filters select."""
