"""What a run says about itself: metrics, alarms, the console, trackers."""
