"""Match each module to the base tensor that it changes, and refuse what cannot be matched."""
