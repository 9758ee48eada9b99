"""What makes a Space of the Hub of `app.py`."""
