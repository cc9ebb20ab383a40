"""What runs in a worker: it boots the app, watches over itself, and leaves when told."""
