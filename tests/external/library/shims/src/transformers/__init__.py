"""In the library's repository its source is here, and the mixins import it from here; what they get is the installed
one. Nothing is lost."""
