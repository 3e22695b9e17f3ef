"""From files to encoded prompts."""
