"""Text, chats and token ids: tokenizers, chat templates, and prompts of every kind."""
