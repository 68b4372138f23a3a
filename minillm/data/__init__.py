"""Records, text and models from files, packages and hubs, as token ids."""
