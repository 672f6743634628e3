package com.google.gson

import groovy.json.JsonSlurper

/** Numbers are doubles, as Gson reads them into a Map. */
class Gson {
    Object fromJson(String text, Class cls) { doubles(new JsonSlurper().parseText(text)) }

    private static Object doubles(Object value) {
        if (value instanceof Map)
            return value.collectEntries { [it.key, doubles(it.value)] }
        if (value instanceof List)
            return value.collect { doubles(it) }
        return value instanceof Number ? value.doubleValue() : value
    }
}
