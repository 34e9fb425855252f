"""Synthesis of training data: a generator makes clips from prompts, a captioner describes them, filters keep pairs.

source -> clip -> caption (again with another seed, where its length misses the window) -> shard

``tools/synthesize.py`` is the command; :func:`univigu.data.synthesis.run.synthesize` the function behind it.
"""
