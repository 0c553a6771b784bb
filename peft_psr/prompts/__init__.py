"""Conversations as token ids: messages, chat templates and their arguments, the answer in what a model wrote."""
