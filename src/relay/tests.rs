//! The relay as readers and runners see it.


