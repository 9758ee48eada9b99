"""The page of `app.py`: `answering` runs the model, `showing` draws what it did, `layout` is what people see."""
