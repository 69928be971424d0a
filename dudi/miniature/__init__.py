"""`dudi train --miniature`: a recipe tried in seconds, before any GPU is rented.

architectures.py cuts a model's configuration down, tokenizers.py makes small tokenizers of the same
kinds, recipe.py turns a recipe's options into those of its miniature, command.py runs and tells.
"""
