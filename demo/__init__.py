"""The demo: a day of an LLM product in a minute, against a stand-in provider.

Sizes of prompts and completions are those of 4,000 real requests: an excerpt of the Azure
LLM inference trace 2023 (code), CC-BY 4.0, from Patel et al., "Splitwise: Efficient
Generative LLM Inference Using Phase Splitting", ISCA 2024. Users and texts are made up.
"""
