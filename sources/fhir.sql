-- FHIR R4 to the tables that prepare_data.py works on. `resources` holds a resource a row (kind, id, own: the hospital's
-- identifier, body: the JSON), `readings` a number of an Observation a row. Times keep the wall clock that was sent.

-- The last part of Encounter/17, https://a.org/fhir/Encounter/17/_history/2 or urn:uuid:17.
CREATE MACRO ref(t) AS regexp_extract(regexp_replace(t, '/_history/.*$', ''), '([^/:]+)$', 1);
-- A code's name and codes as one text.
CREATE MACRO words(c) AS concat_ws(' ', c->>'$.text', array_to_string(c->>'$.coding[*].display', ' '),
                                   array_to_string(c->>'$.coding[*].code', ' '));

-- The hospital's identifier stands for a patient or stay, unless two have the same.
CREATE TABLE patient_ids AS
SELECT id, CASE WHEN count(*) OVER (PARTITION BY own) = 1 THEN coalesce(own, id) ELSE id END AS client,
       try_cast(left(body->>'$.birthDate', 4) AS INTEGER) AS birth_year, body->>'$.gender' AS sex
FROM resources WHERE kind = 'Patient' QUALIFY row_number() OVER (PARTITION BY id ORDER BY body) = 1;

CREATE TABLE encounters AS
SELECT id, own, ref(body->>'$.partOf.reference') AS part_of, ref(body->>'$.subject.reference') AS patient,
       upper(coalesce(body->>'$.class.code', '')) AS class, body->>'$.status' AS status,
       wall(body->>'$.period.start') AS "start", wall_end(body->>'$.period.end') AS stop,
       body->>'$.hospitalization.dischargeDisposition' AS disposition,
       concat(words(body->'$.type[0]'), ' ', body->>'$.meta.profile[0]', ' ', body->>'$.identifier[0].system', ' ',
              array_to_string(body->>'$.location[*].location.display', ' ')) AS about
FROM resources WHERE kind = 'Encounter' AND coalesce(body->>'$.status', '') NOT IN ('cancelled', 'entered-in-error', 'planned')
QUALIFY row_number() OVER (PARTITION BY id ORDER BY body) = 1;

-- Each encounter with the outermost one that it is part of.
CREATE TABLE within AS
WITH RECURSIVE up(id, root) AS (
    SELECT id, id FROM encounters
    UNION
    SELECT up.id, e.part_of FROM up JOIN encounters e ON e.id = up.root
    JOIN encounters parent ON parent.id = e.part_of
)
SELECT up.id, up.root FROM up JOIN encounters e ON e.id = up.root
WHERE e.part_of IS NULL OR e.part_of NOT IN (SELECT id FROM encounters);

-- A stay: an inpatient class; a day in hospital under observation; or any other encounter, emergency or ambulatory, that
-- goes over midnight and lasts 16 hours or more. It starts with the first of its parts, such as the emergency visit.
CREATE TABLE stay_encounters AS
SELECT e.id, min(part."start") AS visit_start
FROM encounters e JOIN within w ON w.root = e.id JOIN encounters part ON part.id = w.id
WHERE e.class IN ('IMP', 'ACUTE', 'NONAC', 'OBSENC', 'SS')
   OR (e."start"::DATE < e.stop::DATE AND e.stop - e."start" BETWEEN INTERVAL 16 HOUR AND INTERVAL 366 DAY)
GROUP BY e.id;

CREATE TABLE visit_ids AS
SELECT w.id AS encounter,
       CASE WHEN count(DISTINCT e.id) OVER (PARTITION BY e.own) = 1 THEN coalesce(e.own, e.id) ELSE e.id END AS visit_id
FROM within w JOIN stay_encounters s ON s.id = w.root JOIN encounters e ON e.id = s.id;

CREATE TABLE visits AS
SELECT v.visit_id, coalesce(p.client, e.patient) AS client, s.visit_start, e.stop AS visit_end,
       CASE WHEN e.disposition IS NOT NULL
            THEN regexp_matches(lower(e.disposition), '"(exp|died|dead|expired)"|deceased|expired|died') END AS died
FROM stay_encounters s JOIN encounters e USING (id) JOIN visit_ids v ON v.encounter = e.id
LEFT JOIN patient_ids p ON p.id = e.patient;

CREATE TABLE icu_stays AS
SELECT CASE WHEN count(*) OVER (PARTITION BY e.own) = 1 THEN coalesce(e.own, e.id) ELSE e.id END AS stay_id,
       v.visit_id, coalesce(p.client, e.patient) AS client, e."start" AS stay_start, e.stop AS stay_end
FROM encounters e LEFT JOIN visit_ids v ON v.encounter = e.id LEFT JOIN patient_ids p ON p.id = e.patient
WHERE e.part_of IS NOT NULL AND regexp_matches(lower(e.about), '\bicu\b|intensive care|critical care');

-- `issued` is when a result could be seen.
CREATE VIEW source_rows AS
SELECT v.visit_id, coalesce(p.client, r.patient) AS client, r.time AS charted, moment(r.issued) AS available, r.code,
       NULL AS value, r.value AS number, r.unit, r.low, r.high
FROM readings r LEFT JOIN patient_ids p ON p.id = r.patient LEFT JOIN visit_ids v ON v.encounter = r.encounter;

CREATE TABLE specimens AS
SELECT id, body->>'$.type.coding[0].display' AS display, words(body->'$.type') AS kind,
       ref(body->>'$.subject.reference') AS patient,
       coalesce(body->>'$.collection.collectedDateTime', body->>'$.collection.collectedPeriod.start') AS collected
FROM resources WHERE kind = 'Specimen' QUALIFY row_number() OVER (PARTITION BY id ORDER BY body) = 1;

-- With the specimen that a code is most often measured in: glucose of urine is not glucose.
CREATE TABLE code_names AS
SELECT r.code, concat(r.name, CASE WHEN s.kind IS NOT NULL THEN concat(' (', trim(s.kind), ')') END) AS name
FROM readings r LEFT JOIN specimens s ON s.id = ref(r.specimen)
GROUP BY r.code, r.name, s.kind
QUALIFY row_number() OVER (PARTITION BY r.code ORDER BY count(*) DESC, r.name, s.kind) = 1;

CREATE TABLE patients_known AS SELECT client, birth_year, sex FROM patient_ids;

-- A drug is named in the order or administration itself, or by a Medication that it refers to; a mixture has the names of
-- its ingredients in its identifier.
CREATE TABLE drugs AS
SELECT id, coalesce(nullif(trim(words(body->'$.code')), ''), '') || ' '
           || coalesce(array_to_string(body->>'$.identifier[*].value', ' '), '') AS name
FROM resources WHERE kind = 'Medication' QUALIFY row_number() OVER (PARTITION BY id ORDER BY body) = 1;

CREATE TABLE given_or_ordered AS
SELECT r.kind = 'MedicationAdministration' AS administered, r.id AS order_id,
       ref(r.body->>'$.subject.reference') AS patient,
       ref(coalesce(r.body->>'$.encounter.reference', r.body->>'$.context.reference')) AS encounter,
       wall(coalesce(r.body->>'$.effectiveDateTime', r.body->>'$.effectivePeriod.start',
                     r.body->>'$.dispenseRequest.validityPeriod.start', r.body->>'$.authoredOn')) AS start,
       wall(coalesce(r.body->>'$.effectivePeriod.end', r.body->>'$.dispenseRequest.validityPeriod.end')) AS stop,
       coalesce(nullif(trim(words(r.body->'$.medicationCodeableConcept')), ''), d.name) AS name,
       trim(coalesce(words(r.body->'$.dosage.route'), words(r.body->'$.dosageInstruction[0].route'))) AS route,
       words(r.body->'$.dosage.method') AS method, ref(r.body->>'$.request.reference') AS request,
       try_cast(r.body->>'$.dosage.rateQuantity.value' AS DOUBLE) AS rate, r.body->>'$.dosage.rateQuantity.unit' AS rate_unit
FROM resources r LEFT JOIN drugs d ON d.id = ref(r.body->>'$.medicationReference.reference')
WHERE r.kind IN ('MedicationRequest', 'MedicationAdministration')
  AND coalesce(r.body->>'$.status', '') NOT IN ('entered-in-error', 'cancelled', 'not-done', 'draft');

-- What the record of an administration says of its method counts too: "Not Given" has the status completed. The drug and
-- the route that an administration lacks are those of the order that it refers to.
CREATE TABLE antibiotics AS
SELECT coalesce(p.client, g.patient) AS client, v.visit_id, s.stay_id, g.start, g.stop,
       trim(concat_ws(' ', g.name, o.name)) AS name,
       coalesce(nullif(g.route, ''), nullif(o.route, '')) AS route, g.administered, g.order_id
FROM given_or_ordered g
LEFT JOIN given_or_ordered o ON g.administered AND NOT o.administered AND o.order_id = g.request
LEFT JOIN patient_ids p ON p.id = g.patient
LEFT JOIN visit_ids v ON v.encounter = g.encounter
LEFT JOIN icu_stays s ON s.visit_id = v.visit_id AND g.start >= s.stay_start AND g.start < s.stay_end
WHERE NOT g.administered OR trim(coalesce(g.method, '')) = '' OR NOT regexp_matches(lower(g.method), '(^|\W)not |flush|hold|stopp');

-- Microbiological Observations, with the specimen that they, or the test that they derive from, were made on.
CREATE TABLE tests AS
SELECT id, ref(body->>'$.specimen.reference') AS specimen, ref(body->>'$.subject.reference') AS patient,
       ref(body->>'$.encounter.reference') AS encounter, body->>'$.effectiveDateTime' AS time,
       ref(body->>'$.derivedFrom[0].reference') AS derived_from,
       regexp_matches(lower(body->>'$.code'), 'organism') OR regexp_matches(lower(concat(body->>'$.valueCodeableConcept')), 'bacteri|coccus|candida|escherichia|klebsiella|pseudomonas') AS organism
FROM resources WHERE kind = 'Microbiology';

CREATE TABLE cultures AS
SELECT any_value(coalesce(p.client, t.patient)) AS client, max(v.visit_id) AS visit_id,
       wall(coalesce(max(s.collected), min(t.time))) AS time,
       length(coalesce(max(s.collected), min(t.time))) > 10 AS has_time,
       max(s.kind) AS specimen, coalesce(bool_or(regexp_matches(lower(s.kind), 'blood')), false) AS blood,
       coalesce(bool_or(t.organism OR o.organism), false) AS positive, coalesce(t.specimen, t.id) AS culture_id
FROM tests t
LEFT JOIN tests o ON o.derived_from = t.id
LEFT JOIN specimens s ON s.id = t.specimen
LEFT JOIN patient_ids p ON p.id = t.patient
LEFT JOIN visit_ids v ON v.encounter = t.encounter
WHERE t.derived_from IS NULL OR t.derived_from = ''
GROUP BY coalesce(t.specimen, t.id);

CREATE TABLE vasopressors AS
SELECT coalesce(p.client, g.patient) AS client, v.visit_id, g.start, g.stop, pressor(g.name) AS drug,
       per_kg(g.rate, g.rate_unit, NULL) AS rate
FROM given_or_ordered g LEFT JOIN patient_ids p ON p.id = g.patient LEFT JOIN visit_ids v ON v.encounter = g.encounter
WHERE g.administered AND g.stop IS NOT NULL AND pressor(g.name) IS NOT NULL;

CREATE TABLE ventilation AS
SELECT coalesce(p.client, ref(r.body->>'$.subject.reference')) AS client, v.visit_id,
       wall(r.body->>'$.performedPeriod.start') AS start, wall(r.body->>'$.performedPeriod.end') AS stop
FROM resources r
LEFT JOIN patient_ids p ON p.id = ref(r.body->>'$.subject.reference')
LEFT JOIN visit_ids v ON v.encounter = ref(r.body->>'$.encounter.reference')
WHERE r.kind = 'Procedure' AND r.body->>'$.performedPeriod.start' IS NOT NULL
  AND regexp_matches(lower(words(r.body->'$.code')), '(^|[^-])\binvasive ventilation|mechanical ventilation');

CREATE TABLE urine AS
SELECT coalesce(p.client, r.patient) AS client, v.visit_id, r.time, r.value AS volume
FROM readings r LEFT JOIN patient_ids p ON p.id = r.patient LEFT JOIN visit_ids v ON v.encounter = r.encounter
WHERE lower(r.unit) = 'ml' AND is_urine(r.name);
