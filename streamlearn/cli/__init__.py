"""The commands. Their modules import neither torch nor kafka at the top, so that quick commands stay quick."""
